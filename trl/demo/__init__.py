"""`trl demo`: a corpus of film reviews, a small model and its tokenizer, and the training steps on them."""
