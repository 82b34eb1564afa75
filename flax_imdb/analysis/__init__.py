"""What a trained or compiled program tells of itself."""
