"""What a user may write: one model per YAML section, loading, merging, older spellings, errors. No torch."""
