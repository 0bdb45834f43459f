/* cuBLAS without a card: products do nothing. */
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { return "stub status"; }
const char *cublasGetStatusString(int status) { return "stub status"; }
