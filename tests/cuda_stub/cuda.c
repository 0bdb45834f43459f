/* The driver without a card: it reports one. */
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuInit(unsigned flags) { return 0; }
