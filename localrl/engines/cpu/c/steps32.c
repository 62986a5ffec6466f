/* The kernels, for vectors of 32 bytes. */
#define BYTES 32
#include "build.h"

const Steps steps32 = TABLE;
