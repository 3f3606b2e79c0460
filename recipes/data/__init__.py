"""Files to tokens: rows, tokenizers, films, the order in which rows are drawn."""
