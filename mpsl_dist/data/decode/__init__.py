"""From files to tensors: pictures, video frames, sound and text."""
