"""Text sent to and received from models: prompts, answers, sentences, repetition, JSON schemas."""
