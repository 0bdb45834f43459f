"""The commands of vqtrain, one file each."""
