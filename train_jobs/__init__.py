"""What `ray job submit` runs: fine-tuning and evaluation."""
