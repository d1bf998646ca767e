"""What a config costs and does, known before it is started."""
