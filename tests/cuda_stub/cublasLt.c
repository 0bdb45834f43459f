/* cuBLASLt without a card: no product has an algorithm, so that the provider takes cuBLAS's. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                   void *preference, int room, void *found, int *count) {
  *count = 0;
  return 0;
}
