"""Models x methods x sparsities from one file: what is missing is run, what is done is kept, all of it in one table."""
