"""Images and labels, without TensorFlow.

* `splits`: the splits of a data set; `arrays` of `.npz` files.
* `tfds`, `tfrecord`: of a prepared TFDS set.
* `augment`, `preprocess`: what is done to images.
* `digits`: handwritten digits, offline.
"""
