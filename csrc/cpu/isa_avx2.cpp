#define FASTCL_ISA avx2
#define FASTCL_BYTES 32
#define FASTCL_ROWS 6
#define FASTCL_DOT 0
#include "engine_body.h"
