"""What an honest but curious server learns from what its clients really send."""
