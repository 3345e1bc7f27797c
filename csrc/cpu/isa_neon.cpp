#define FASTCL_ISA neon
#define FASTCL_BYTES 16
#define FASTCL_ROWS 12
#define FASTCL_DOT 0
#include "engine_body.h"
