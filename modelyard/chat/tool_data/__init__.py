"""Public sets of tool calls, as their files come, turned into conversations: one reader a set (docs/tool-data.md)."""
