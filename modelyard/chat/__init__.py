"""Conversations: messages → typed segments → tokens that know what they are."""
