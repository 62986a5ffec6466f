/* The kernels, for vectors of 16 bytes. */
#define BYTES 16
#include "build.h"

const Steps steps16 = TABLE;
