// Preloaded where ranks of tests are forked (tests/ranks.py): torch marks children of a process that has asked for devices as
// unable to use CUDA, by a handler of forks. The real runtime cannot be used after a fork; this one can.
int __register_atfork(void *prepare, void *parent, void *child, void *dso) { return 0; }
