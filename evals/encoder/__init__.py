"""What any encoder knows, read off its frozen features by methods too simple to add anything.

``features`` runs an encoder over images; ``classify`` reads whole images (k nearest neighbours, linear classifiers),
``dense`` single patches, ``zero_shot`` and ``retrieval`` what an aligned pair of towers says. Everything is
deterministic and knows no data set.
"""
