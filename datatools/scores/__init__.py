"""The mathematics of scores that are no gradient influence: tensors and counts in, one number per row out."""
