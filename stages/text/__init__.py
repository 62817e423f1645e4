"""Text sent to and received from models, and its choice for training sets."""
