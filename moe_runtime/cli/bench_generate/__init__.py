"""`moe-runtime bench generate`: decoding against no cache and transformers, drafts, and prefixes."""
