/* cuDNN 9 without a card: every graph has one engine, which computes nothing, or fails if
   STUB_CUDNN_STATUS says so, as cuDNN does that finds no engine for a layer. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

size_t cudnnGetVersion(void) { return 91300; }
const char *cudnnGetErrorString(int status) { return status ? "stub failure" : "success"; }
void cudnnGetLastErrorString(char *message, size_t size) { if (size) message[0] = 0; }
int cudnnGetStream(void *handle, void **stream) { *stream = 0; return 0; }
int cudnnGetReductionWorkspaceSize(void *h, void *r, void *a, void *c, size_t *size) {
  *size = 0;
  return 0;
}
int cudnnGetReductionIndicesSize(void *h, void *r, void *a, void *c, size_t *size) {
  *size = 64;
  return 0;
}

int cudnnBackendCreateDescriptor(int kind, void **descriptor) {
  *descriptor = calloc(1, 256);
  return 0;
}

/* Descriptors (15) are made by the caller, all other attributes are zero; handles (0) and int64
   (3) have one value, all else, such as numerical notes, none. */
int cudnnBackendGetAttribute(void *descriptor, int attribute, int type, int64_t room,
                             int64_t *count, void *values) {
  int one = type == 0 || type == 3;
  if (type == 15) {
    if (count) *count = room ? room : 1;
    return 0;
  }
  if (values && room > 0) memset(values, 0, type == 4 ? 4 : 8);
  if (count) *count = one;
  return 0;
}

int cudnnBackendExecute(void *handle, void *plan, void *pack) {
  const char *status = getenv("STUB_CUDNN_STATUS");
  return status ? atoi(status) : 0;
}
