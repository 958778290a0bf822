// Every size and index inside the arrays of a runner.bin, checked once when it is opened, so that nothing that walks
// through them has to. It does not prove that the arrays say what the exporter wrote: `gori verify` compares the hash.
#pragma once

#include "tables.h"

namespace gori {

// Of the tokenizer and the prompt; Error where an array would lead out of another one.
void check_text(const Tables& tables);

// The same of the grammar of calls; after check_text.
void check_grammar(const Tables& tables);

}  // namespace gori
