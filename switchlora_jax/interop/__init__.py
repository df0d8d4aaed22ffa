"""Loading saved models, and conversion to and from other formats.

pretrained      opens a run or a Hugging Face folder, and reads its plain weights
huggingface     writes and reads Hugging Face folders
tokenizer_json  converts a SentencePiece model for `transformers`
export          exports a run as a Hugging Face folder, and verifies it
"""
