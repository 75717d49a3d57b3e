"""What agents see: features, masks, action levels."""
