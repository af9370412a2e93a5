"""What is kept of pictures that are gone: class statistics, and features drawn from them. No Ray, no files."""
