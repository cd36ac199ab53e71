"""What is minimised: text and action losses, and the weight between them."""
