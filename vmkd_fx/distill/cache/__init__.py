"""What a teacher says about every image of every epoch, computed once for many students.

An image of a training follows from (seed, epoch, sample) alone, and so does what a frozen teacher says of
it. A cache is a folder with one teacher's outputs under these keys (`folder.py`), in files of some thousand
samples (`shards.py`), as whole or shortened distributions (`form.py`). Each row has a sketch of the image
that the teacher saw (`sketch.py`), which training compares with the image that it has.
"""
