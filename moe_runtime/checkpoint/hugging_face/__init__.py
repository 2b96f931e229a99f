"""Models in Hugging Face's form: DeepSeek's names in safetensors shards, config.json, tokenizer.json."""
