"""Whether a results store is what was written into it, and what to do where it is not."""
