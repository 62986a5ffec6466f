/* The kernels, for vectors of 64 bytes. */
#define BYTES 64
#include "build.h"

const Steps steps64 = TABLE;
