"""Are the pictures still right? The same latents through a reference and through what is to be checked."""
