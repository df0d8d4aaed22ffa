"""Loading saved models, and conversion to and from other formats.

pretrained      opens a run or a Hugging Face folder, and reads its plain weights
huggingface     writes and reads Hugging Face folders
families        config.json of Hugging Face and config.model, for each family of decoders
tokenizer_json  special ids and prefixes of tokenizers; converts a SentencePiece model for `transformers`
export          exports a run as a Hugging Face folder, and verifies it
"""
