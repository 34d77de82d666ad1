// Every kernel, for one instruction set. build.py compiles this file once per set, with
//   -DISA=<suffix of the names> -DLANES=<floats of a vector>

#include "bi_wkv.h"
#include "gemv.h"
#include "grid_mix.h"
#include "rwkv7_layer.h"
#include "token7.h"
#include "token_mix.h"
#include "wkv4.h"
#include "wkv6.h"
#include "wkv7.h"
