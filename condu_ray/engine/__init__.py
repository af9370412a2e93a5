"""Where work runs: the session spine, Ray Train, the fusion actor, features and evaluation over the cluster."""
