"""What a person looks at afterwards: MLflow runs, the accuracy matrix, pictures. Decides nothing."""
