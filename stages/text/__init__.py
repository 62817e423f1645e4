"""Text in and out of models: prompts, answers, sentences, repetition, JSON schemas."""
