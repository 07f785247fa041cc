"""Networks whose images get smaller from stage to stage: a file for each."""
