"""What each system does with a task: what it trains, what it keeps, which expert answers. Never where it runs."""
