"""What blocks cost and what they are worth: figures beside the paper's closed forms, and pictures of them."""
