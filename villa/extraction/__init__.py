"""Region features of images: extractors, and what writes their features for the data sets to read."""
