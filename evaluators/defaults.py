"""What evaluators do unless told otherwise, where a door's help can quote it without importing torch."""

K = 20  # neighbours
TEMPERATURE = 0.07  # of their votes
PER_CLASS, SHARES, DRAWS = (1, 5, 10), (1.0, 10.0), 5  # labels of few: images a class, percent of each, repeats
PROTOCOLS = ("mae", "ijepa", "barlow_twins", "vissl")  # see `protocols`
COMPARABLE = ("probe", "knn", "ncm", "fewshot", "anomaly")
COMPARED = COMPARABLE[:4]  # anomaly takes long with many classes
