"""The commands, a file for what is done at one time: none imports torch before it must."""
