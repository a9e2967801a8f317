"""Behind the entrance: from a configuration to a run. Here `config` objects end; what is below takes arguments.

resolve         a configuration, completed by the data set and checked
tasks           what is trained: a classifier, or a network that segments or detects
placement, build                what it describes: devices and formats, what trains a model
backbone        the classifier that a network of another task begins with
resume          the checkpoint and scales that a run goes on from
run             train, evaluate, measure throughput
trained         a network from its checkpoint
quantize        a trained network to INT8
files           names of what they write
"""
