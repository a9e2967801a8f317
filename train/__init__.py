"""The application: from a command line to a run. Below it, `data` and `repopt` take explicit arguments.

command, keys           the command line: its flags, its exit codes, the declaration of every key
config, resolve         recipes and values; a new, frozen configuration, completed by the data set and checked
tasks, evaluation       what is trained: a classifier, or a network that segments or detects; what it is worth
run                     train, evaluate, measure throughput
trainer                 the loop: a step, an epoch, a training
nonfinite, precision, schedule, parallel, compilation, interruption, throughput     parts of it
state, checkpoint       what is trained, and how it goes to the disk and comes back
resume, backbone, trained       what a run goes on from or begins with; a network from its checkpoint
build, placement        what a configuration describes: optimizer and schedule; devices and formats
quantize                a trained network to INT8
distributed, logging, run_record, files     processes; lines and numbers; what a run says of itself; names of files
"""
