"""open_clip models: loading, features, text targets, LoRA. Knows nothing of tasks or stores."""
