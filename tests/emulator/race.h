// The race check of each operator: race_<op>.cpp runs its launch functions on cases that reach every kernel.
#pragma once

// 0, or 1 where a launch was refused
int race_adaln();
int race_masked_loss();
int race_token_sampling();
int race_unmask();
