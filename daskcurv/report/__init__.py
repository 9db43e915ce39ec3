"""A results store as one page of pictures: `daskcurv report`."""
