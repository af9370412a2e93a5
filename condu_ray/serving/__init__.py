"""The voting classifier behind a URL, on Ray Serve: front (HTTP), replicas (versions, batches, votes), page."""
