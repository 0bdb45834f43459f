"""The commands of vqref, one file each."""
